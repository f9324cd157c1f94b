"""`python -m workflow_scripts.status`."""

from .cli import main

if __name__ == "__main__":
    main()
