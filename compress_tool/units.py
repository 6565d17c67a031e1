"""Numbers of this project as a person reads them: bytes, parameters, time."""

from __future__ import annotations


def bytes_text(num_bytes: int) -> str:
    """`20760136` → `20.8 MB`; decimal units, as disks and model pages count."""
    return _scaled(num_bytes, ("bytes", "kB", "MB", "GB", "TB"))


def params_text(num_params: int) -> str:
    """`10368128` → `10.4 M`, `46702792704` → `46.7 B`."""
    return _scaled(num_params, ("", "k", "M", "B", "T"))


def clock_text(seconds: float) -> str:
    """`75.2` → `1:15`, `3675` → `1:01:15`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def percent_text(change: float) -> str:
    """`-0.4021` → `−40.2 %`; the sign is always there."""
    return f"{change:+.1%}".replace("-", "−").replace("%", " %")


def _scaled(value: int, units: tuple[str, ...]) -> str:
    if value < 1000:
        return f"{value} {units[0]}".rstrip()
    scaled, unit = float(value), 0
    # 999.95 would be shown as 1000.0 of the smaller unit.
    while scaled >= 999.95 and unit < len(units) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{scaled:.1f} {units[unit]}"
