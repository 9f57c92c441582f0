"""What a user asks for, one file each: the commands' work without their printing."""
