"""A recipe made for a person: from rows, or from the configuration of another tool."""
