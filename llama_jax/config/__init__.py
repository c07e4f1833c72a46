"""Configuration: of a model, of a run, and the YAML file that contains both."""
