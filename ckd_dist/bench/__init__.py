"""What this machine reaches, and what it could: every rate beside the limit that it is held against."""
