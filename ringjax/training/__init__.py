"""The training job behind `ringjax train`. Uses ringjax's public surface only; import its modules by name."""
