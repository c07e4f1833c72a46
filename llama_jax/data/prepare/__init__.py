"""From raw dumps to documents: the rules of section 2.1 of LLaMA's paper, one module per source."""
