# What tests.sh printed, a line for each program, and the first 40 lines of what each test said that failed. Variables:
# name (of the kernel), expected (the programs, by spaces), counts (a file for `passed failed skipped kvm`: of all tests,
# and how many of those with the label kvm ran), whole (whether all tests of each program were wanted: then not all of a
# label can have been skipped; all of one program can, for a kernel may lack what it tests).
# Status 1: not everything passed, and what is wrong was printed.

# A machine for one part of the tests of one label. One that stopped was started again.
/^lab: kernel / {
  machine = $(NF - 2) " " $NF
  for (each in machine_of) {
    if (machine_of[each] != machine) continue
    delete passed[each]; delete failed[each]; delete skipped[each]; delete names[each]; delete ended[each]
  }
  facts[machine] = said = ""
}

/^lab: fact: / { facts[machine] = facts[machine] substr($0, 12) "\n" }
# A run is of one part of a program's tests.
/^lab: begin / {
  run = $3 " " $5
  label[$3] = $4
  machine_of[run] = $4 " " $5
  parts[$3] = substr($5, index($5, "/") + 1)
}
/^lab: end / { status[run] = $4; seconds[run] = $5; ended[run] = 1; run = "" }

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
/^\[       OK \] .* \([0-9]+ ms\)$/ { passed[run]++ }
/^\[  SKIPPED \] .* \([0-9]+ ms\)$/ { skipped[run]++ }
/^\[  FAILED  \] .* \([0-9]+ ms\)$/ {
  failed[run]++
  sub(/,$/, "", $4)
  names[run] = names[run] "\n  failed: " $4 said
}

END {
  # Of one machine; they are alike.
  printf "%s", ("- 1/1" in facts) ? facts["- 1/1"] : facts[machine]
  count = split(expected, programs, " ")
  for (i = 1; i <= count; i++) {
    program = programs[i]
    did_pass = did_fail = were_skipped = took = 0
    wrong = ""
    if (!parts[program]) parts[program] = 1
    for (part = 1; part <= parts[program]; part++) {
      run = program " " part "/" parts[program]
      if (!ended[run]) {
        wrong = wrong "\n  failed: " (parts[program] > 1 ? "part " part "/" parts[program] " " : "") "did not come to its end"
        failed[run]++
      } else if (status[run] != 0 && !failed[run]) {
        wrong = wrong "\n  failed: it ended with status " status[run]
        failed[run] = 1
      }
      did_pass += passed[run]
      did_fail += failed[run]
      were_skipped += skipped[run]
      took += seconds[run]
      wrong = wrong names[run]
    }
    if (did_fail) bad = 1
    if (!(did_pass + did_fail + were_skipped)) {
      wrong = wrong "\n  it ran no test"
      bad = 1
    }
    of_label[label[program]] += did_pass + did_fail
    printf "%s %s: %d passed, %d failed, %d skipped; %d s%s\n", name, program, did_pass, did_fail, were_skipped, took, wrong
    total_passed += did_pass
    total_failed += did_fail
    total_skipped += were_skipped
    if (label[program] == "kvm") on_kvm += did_pass + did_fail
  }
  for (each in of_label) {
    if (!whole || of_label[each]) continue
    print name ": every test of the machine for " (each == "-" ? "memory" : each) " was skipped"
    bad = 1
  }
  print total_passed + 0, total_failed + 0, total_skipped + 0, on_kvm + 0 >counts
  exit bad
}
