"""What every part uses: the segment, its native module, settings, and a look inside."""
