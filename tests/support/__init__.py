"""What the tests share: names of segments, and code that runs in real child processes."""
