"""The kinds of adapters (PEFT's `peft_type`): how the files of each are read and written."""
