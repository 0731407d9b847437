"""Through a real mitmdump."""
