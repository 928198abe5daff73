"""What happens to a packet: one stage, one file, one kernel, and files with what several stages or a long one need."""
