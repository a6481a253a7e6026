"""A simulated robot behind the node's topics."""
