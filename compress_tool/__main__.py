"""`python -m compress_tool`."""

from compress_tool.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
