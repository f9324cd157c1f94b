"""`python -m workflow_scripts.shapes_models`: builds the demo's models."""

from workflow_scripts.demo.models import main

if __name__ == "__main__":
    main()
