"""An adapter as data and files: reading it in every form that PEFT has, writing it, and putting it on a model."""
