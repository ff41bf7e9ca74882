"""Claims about GPUs; without one these modules end with an error. They do not import Ray."""
