"""`python -m autotune`, for a checkout that is not installed."""

from .command import main

if __name__ == "__main__":
    raise SystemExit(main())
