"""The tool `status`: what the trainings are doing."""
