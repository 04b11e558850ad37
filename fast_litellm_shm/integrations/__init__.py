"""What plugs this library into others. Each module imports what it is for: that must be there."""
