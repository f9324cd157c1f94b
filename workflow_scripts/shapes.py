"""`python -m workflow_scripts.shapes`: draws the demo's data."""

from workflow_scripts.demo.shapes import main

if __name__ == "__main__":
    main()
