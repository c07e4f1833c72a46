"""The device mesh: how arrays are split over it, and the collectives."""
