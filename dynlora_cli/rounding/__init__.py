"""An adapter's numbers in fewer bits."""
