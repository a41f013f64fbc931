"""Long runs that look for what goes wrong seldom."""
