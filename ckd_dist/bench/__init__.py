"""What this machine reaches, against what it could: each file measures one subject and gives rows of rates."""
