"""Plans runs on TPU pods: compiles the programs for them, no TPU needed; reports memory, time."""
