"""The hypernetworks, one file each: see hypernets/hypernet.py for what such a file holds."""
