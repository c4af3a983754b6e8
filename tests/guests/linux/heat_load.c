// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// What a Linux guest does while heat_hint is loaded: has memory full of data, checks it, frees it, and waits until the
// module has told the host of it. A part of the data stays, and is checked in the end.
//
// heat_load keep=MIB anonymous=MIB file=MIB
//
// `file` is one in the page cache of a tmpfs: a guest that is only an initial file system has no other. What came of it
// are lines on the console: the module's, which it asks at `before`, `full` and `after`, and one of its own. Status 1:
// something failed, which is said.
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define PARAMETERS "/sys/module/heat_hint/parameters/"
#define MIB (1UL << 20)
#define CHUNK_WORDS (MIB / sizeof(uint64_t))

static int console = -1;

// One line, whole, whatever else goes there: through the kernel's log, as an error so that it is shown.
__attribute__((format(printf, 1, 2))) static void say(const char* format, ...) {
  char line[512] = "<3>cppvmm: ";
  const size_t begin = strlen(line);
  va_list values;

  va_start(values, format);
  vsnprintf(line + begin, sizeof line - begin, format, values);
  va_end(values);
  if (write(console, line, strlen(line)) < 0) exit(2);
}

static void fail(const char* what) {
  say("{\"module\": \"heat_load\", \"error\": \"%s: %s\"}", what, strerror(errno));
  exit(1);
}

// ---- the module

static void read_parameter(const char* path, char* text, size_t room) {
  const int file = open(path, O_RDONLY);
  const ssize_t count = file < 0 ? -1 : read(file, text, room - 1);

  if (count < 0) fail(path);
  text[count] = 0;
  close(file);
}

static unsigned long hinted_pages(void) {
  char text[32];

  read_parameter(PARAMETERS "pages", text, sizeof text);
  return strtoul(text, NULL, 10);
}

static void ask(const char* word) {
  const int file = open(PARAMETERS "ask", O_WRONLY);

  if (file < 0 || write(file, word, strlen(word)) < 0) fail(PARAMETERS "ask");
  close(file);
}

// Until the host was told of next to nothing for some rounds of Linux's reporting, which are 2 s apart. A single page
// that becomes free can complete a block, and some wait for a while in lists of their own (of a CPU, of the page
// cache).
static void settle(void) {
  const struct timespec round = {.tv_sec = 2};
  const int most_rounds = 300, quiet_rounds = 3;
  unsigned long last = hinted_pages();
  int i, quiet = 0;

  for (i = 0; i < most_rounds && quiet < quiet_rounds; i++) {
    nanosleep(&round, NULL);
    const unsigned long now = hinted_pages();

    quiet = (now - last) * 4096 < MIB ? quiet + 1 : 0;
    last = now;
  }
  if (quiet == quiet_rounds) return;
  say("{\"module\": \"heat_load\", \"error\": \"there is no end to what is reported\"}");
  exit(1);
}

// ---- the data

// No word of it is zero.
static uint64_t word_of(uint64_t seed, uint64_t i) { return (seed << 40 | i) * 0x9E3779B97F4A7C15 | 1; }

static void fill(uint64_t* words, size_t count, uint64_t seed, uint64_t first) {
  for (size_t i = 0; i < count; i++)
    words[i] = word_of(seed, first + i);
}

static uint64_t wrong_words(const uint64_t* words, size_t count, uint64_t seed, uint64_t first) {
  uint64_t wrong = 0;

  for (size_t i = 0; i < count; i++)
    wrong += words[i] != word_of(seed, first + i);
  return wrong;
}

struct memory {
  uint64_t* words;
  size_t mib;
  uint64_t seed;
};

static struct memory filled(size_t mib, uint64_t seed) {
  const struct memory made = {.words =
                                  mmap(NULL, mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
                              .mib = mib,
                              .seed = seed};

  if (made.words == MAP_FAILED) fail("mmap");
  fill(made.words, mib * CHUNK_WORDS, seed, 0);
  return made;
}

static uint64_t wrong_in(struct memory memory) {
  return wrong_words(memory.words, memory.mib * CHUNK_WORDS, memory.seed, 0);
}

static void fill_file(int file, uint64_t* chunk, size_t mib, uint64_t seed) {
  for (size_t i = 0; i < mib; i++) {
    fill(chunk, CHUNK_WORDS, seed, i * CHUNK_WORDS);
    if (write(file, chunk, MIB) != (ssize_t)MIB) fail("write to the file");
  }
}

static uint64_t wrong_in_file(int file, uint64_t* chunk, size_t mib, uint64_t seed) {
  uint64_t wrong = 0;

  for (size_t i = 0; i < mib; i++) {
    if (pread(file, chunk, MIB, i * MIB) != (ssize_t)MIB) fail("read of the file");
    wrong += wrong_words(chunk, CHUNK_WORDS, seed, i * CHUNK_WORDS);
  }
  return wrong;
}

static size_t number(int count, char** arguments, const char* name) {
  const size_t length = strlen(name);

  for (int i = 1; i < count; i++)
    if (!strncmp(arguments[i], name, length) && arguments[i][length] == '=')
      return strtoul(arguments[i] + length + 1, NULL, 10);
  return 0;
}

int main(int count, char** arguments) {
  const size_t keep_mib = number(count, arguments, "keep"), anonymous_mib = number(count, arguments, "anonymous"),
               file_mib = number(count, arguments, "file");
  static uint64_t chunk[CHUNK_WORDS];
  struct memory kept[3], anonymous;
  uint64_t wrong = 0, wrong_kept = 0;
  int file;

  mknod("/dev/kmsg", S_IFCHR | 0600, makedev(1, 11));
  console = open("/dev/kmsg", O_WRONLY);
  if (console < 0) return 2;
  mkdir("/files", 0700);
  if (mount("files", "/files", "tmpfs", 0, "size=100%") != 0) fail("a tmpfs");

  kept[0] = filled(keep_mib, 1);
  settle();
  ask("before");

  // What stays lies between what goes.
  anonymous = filled(anonymous_mib / 2, 2);
  kept[1] = filled(1, 3);
  file = open("/files/data", O_RDWR | O_CREAT, 0600);
  if (file < 0) fail("the file");
  fill_file(file, chunk, file_mib, 4);
  kept[2] = filled(1, 5);
  const struct memory more = filled(anonymous_mib - anonymous_mib / 2, 6);
  ask("full");
  wrong += wrong_in(anonymous) + wrong_in(more) + wrong_in_file(file, chunk, file_mib, 4);

  munmap(anonymous.words, anonymous.mib * MIB);
  munmap(more.words, more.mib * MIB);
  close(file);
  if (unlink("/files/data") != 0) fail("unlink");
  settle();
  ask("after");

  // What was given back is memory as any other.
  anonymous = filled(anonymous_mib, 7);
  wrong += wrong_in(anonymous);
  for (int i = 0; i < 3; i++)
    wrong_kept += wrong_in(kept[i]);
  say("{\"module\": \"heat_load\", \"wrong_words\": %lu, \"wrong_kept_words\": %lu, \"pages\": %lu}",
      (unsigned long)wrong, (unsigned long)wrong_kept, hinted_pages());
  return 0;
}
