"""What happens to dynlora when it is killed, given damaged input, a full disk, a wrong clock, or a second writer.

`scripts/reliability/run` tries it by the thousand and writes scripts/bench/RELIABILITY.md; `--bounded` takes a minute.
"""
