"""Several processes: their meeting, their memory, states on another number of them."""
