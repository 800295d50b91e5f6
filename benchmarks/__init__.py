"""Where the README's figures come from: each script prints a table and the machine."""
