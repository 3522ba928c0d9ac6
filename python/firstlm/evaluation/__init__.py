"""`firstlm evaluate`: FiRST beside every rival way to choose layers, at the same skip rate."""
