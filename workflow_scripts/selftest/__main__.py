"""`python -m workflow_scripts.selftest`."""

from .cli import main

if __name__ == "__main__":
    main()
