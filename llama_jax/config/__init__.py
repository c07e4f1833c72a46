"""What a run is configured with: the model, the run, and the YAML file."""
