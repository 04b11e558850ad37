#!/bin/sh
# expect.sh PROGRAM FAULT... - run PROGRAM once for each fault: it must exit with 99, by which the tools
# are told to say that they have found something; with 0 for a fault called none-... $RUN: a command before it.
program=$1
shift
passed=0
failed=0
for fault in "$@"; do
  case $fault in none-*) wanted=0 ;; *) wanted=99 ;; esac
  said=$($RUN "$program" "$fault" 2>&1)
  status=$?
  if [ $status -eq $wanted ]; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    echo "$RUN $program $fault: exits with $status, not $wanted; it said:"
    echo "$said"
  fi
done
echo "$passed passed, $failed failed: faults that must be reported"
[ $failed -eq 0 ]
