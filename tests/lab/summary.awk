# What tests.sh printed, a line for each program, and the first 40 lines of what each test said that failed. Variables:
# name (of the kernel), expected (the programs, by spaces), counts (a file for `passed failed skipped kvm`: of all tests,
# and how many of those with the label kvm ran), whole (whether all tests of each program were wanted: then not all of a
# label can have been skipped; all of one program can, for a kernel may lack what it tests).
# Status 1: not everything passed, and what is wrong was printed.

# A machine for the tests of one label. One that stopped was started again.
/^lab: kernel / {
  machine = $NF
  for (each in label) {
    if (label[each] != machine) continue
    delete passed[each]; delete failed[each]; delete skipped[each]; delete names[each]; delete ended[each]
  }
  facts[machine] = said = ""
}

/^lab: fact: / { facts[machine] = facts[machine] substr($0, 12) "\n" }
/^lab: begin / { program = $3; label[$3] = $4 }
/^lab: end / { program = ""; status[$3] = $4; seconds[$3] = $5; ended[$3] = 1 }

/^\[ RUN      \] / {
  said = ""
  lines = 0
  next
}
# Kernels' own lines begin with a bracket too.
!/^\[( RUN| +OK|  FAILED|  SKIPPED|  PASSED|-+|=+)/ && lines < 40 {
  said = said "\n    " $0
  lines++
}

# GoogleTest names a test with its time when it ends, and failed and skipped ones again, without, after all.
/^\[       OK \] .* \([0-9]+ ms\)$/ { passed[program]++ }
/^\[  SKIPPED \] .* \([0-9]+ ms\)$/ { skipped[program]++ }
/^\[  FAILED  \] .* \([0-9]+ ms\)$/ {
  failed[program]++
  sub(/,$/, "", $4)
  names[program] = names[program] "\n  failed: " $4 said
}

END {
  printf "%s", ("-" in facts) ? facts["-"] : facts["kvm"]
  count = split(expected, programs, " ")
  for (i = 1; i <= count; i++) {
    program = programs[i]
    if (!ended[program]) {
      print name " " program ": did not come to its end"
      bad = 1
      total_failed++
      continue
    }
    if (status[program] != 0 && !failed[program]) {
      failed[program] = 1
      names[program] = "\n  failed: it ended with status " status[program]
    }
    if (failed[program]) bad = 1
    if (!(passed[program] + failed[program] + skipped[program])) {
      names[program] = names[program] "\n  it ran no test"
      bad = 1
    }
    of_label[label[program]] += passed[program] + failed[program]
    printf "%s %s: %d passed, %d failed, %d skipped; %d s%s\n", name, program, passed[program], failed[program],
      skipped[program], seconds[program], names[program]
    total_passed += passed[program]
    total_failed += failed[program]
    total_skipped += skipped[program]
    if (label[program] == "kvm") on_kvm += passed[program] + failed[program]
  }
  for (each in of_label) {
    if (!whole || of_label[each]) continue
    print name ": every test of the machine for " (each == "-" ? "memory" : each) " was skipped"
    bad = 1
  }
  print total_passed + 0, total_failed + 0, total_skipped + 0, on_kvm + 0 >counts
  exit bad
}
