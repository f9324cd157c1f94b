"""`python -m workflow_scripts.acquire`."""

from .step import main

if __name__ == "__main__":
    main()
