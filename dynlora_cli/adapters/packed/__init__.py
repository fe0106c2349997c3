"""An adapter in a few bits a number, to be sent and stored; `dynlora export --to peft` unpacks it."""
