"""Device meshes, the sharding of arrays over them, and collectives."""
