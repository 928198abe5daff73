"""What happens to a packet: one file, one stage, one kernel."""
