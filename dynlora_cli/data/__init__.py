"""From rows in files to batches of tokens with a label for each."""
