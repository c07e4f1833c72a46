"""Loss, optimizer, training step and the loop around them."""
