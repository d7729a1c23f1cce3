"""What each phase measures: a module with `measure(to, setting)`, whose first lines say what."""
