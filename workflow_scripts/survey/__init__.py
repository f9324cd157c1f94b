"""What training will see of every record of a mixture: tokens, labels, cuts; before a GPU is asked for."""
