"""The work of the commands without their printing, one file each."""
