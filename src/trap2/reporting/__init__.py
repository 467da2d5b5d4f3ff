"""What people see of an audit: pure functions of the record in `trap2.schema`."""
