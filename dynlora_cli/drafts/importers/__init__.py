"""Tools whose configurations are turned into recipes; each file is one tool, see drafts/importer.py."""
