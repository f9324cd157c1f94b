"""`python -m workflow_scripts.evaluate`."""

from .step import main

if __name__ == "__main__":
    main()
