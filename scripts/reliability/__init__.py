"""What happens to dynlora when it is killed, given damaged input, a full disk, a wrong clock, or a second writer.

`python scripts/reliability --seed N` tries it by the thousand and writes scripts/bench/RELIABILITY.md; with `--bounded`
it takes less than a minute.
"""
