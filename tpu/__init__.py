"""Planning for TPUs that are not there, and processes on this machine that stand in for hosts."""
