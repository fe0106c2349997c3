"""Reading what was written for another tool: YAML, JSON, a shell script, Python or a notebook. None is ever run."""
