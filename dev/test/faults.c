/* Makes one call of the C library fail, on purpose. faults.py compiles this library and preloads it (LD_PRELOAD):

    FAULT="write 12 error 28"    the 12th write after main() began fails with errno 28, ENOSPC
    FAULT="read 3 short 0"       the 3rd read transfers at most half of what it was asked to
    FAULT="rename 2 signal 9"    just before its 2nd rename, the process gets signal 9
    FAULT_COUNTS=FILE            at exit, writes "NAME CALLS" a line for each function that was called

"large" counts the allocations of at least 4,096 bytes, "malloc" all of them. For Linux with the GNU C library. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FUNCTIONS(F) \
    F(open) F(openat) F(read) F(pread) F(write) F(pwrite) F(close) F(fsync) F(rename) F(unlink) F(mkdir) F(link) \
    F(linkat) F(rmdir) F(stat) F(fstat) F(lstat) F(access) F(ftruncate) F(flock) F(opendir) F(fdopendir) F(readdir) \
    F(fopen) F(fflush) F(fclose) F(mmap) F(pthread_create) F(malloc) F(large)
#define ID(name) ID_##name,
#define NAME(name) #name,
enum { FUNCTIONS(ID) N };
static const char* const names[N] = {FUNCTIONS(NAME)};
static atomic_long calls[N];

static char function[32], action[16];  // of FAULT
static long at, number;
static atomic_int armed;  // main() is running

// Counts a call. Returns 0 if it shall succeed, an errno if it shall fail, SHORT if it shall transfer less.
enum { SHORT = -1 };
static int arrive(int id) {
    if (!armed) return 0;
    long n = ++calls[id];
    if (n != at || strcmp(names[id], function) != 0) return 0;
    if (strcmp(action, "signal") == 0) kill(getpid(), number);
    return strcmp(action, "short") == 0 ? SHORT : strcmp(action, "error") == 0 ? number : 0;
}

// The function that is replaced here
#define NEXT(name) \
    static __typeof__(name)* next; \
    if (!next) next = (__typeof__(name)*)dlsym(RTLD_NEXT, #name)

#define FAILS(type, name, failed, parameters, ...) \
    type name parameters { \
        NEXT(name); \
        const int error = arrive(ID_##name); \
        if (error > 0) return errno = error, failed; \
        return next(__VA_ARGS__); \
    }
FAILS(int, fsync, -1, (int fd), fd)
FAILS(int, rename, -1, (const char* from, const char* to), from, to)
FAILS(int, unlink, -1, (const char* path), path)
FAILS(int, rmdir, -1, (const char* path), path)
FAILS(int, mkdir, -1, (const char* path, mode_t mode), path, mode)
FAILS(int, link, -1, (const char* from, const char* to), from, to)
FAILS(int, linkat, -1, (int a, const char* from, int b, const char* to, int flags), a, from, b, to, flags)
FAILS(int, stat, -1, (const char* restrict path, struct stat* restrict s), path, s)
FAILS(int, lstat, -1, (const char* restrict path, struct stat* restrict s), path, s)
FAILS(int, fstat, -1, (int fd, struct stat* s), fd, s)
FAILS(int, access, -1, (const char* path, int mode), path, mode)
FAILS(int, ftruncate, -1, (int fd, off_t n), fd, n)
FAILS(int, flock, -1, (int fd, int operation), fd, operation)
FAILS(DIR*, opendir, NULL, (const char* path), path)
FAILS(DIR*, fdopendir, NULL, (int fd), fd)
FAILS(struct dirent*, readdir, NULL, (DIR* d), d)
FAILS(FILE*, fopen, NULL, (const char* restrict path, const char* restrict mode), path, mode)
FAILS(int, fflush, EOF, (FILE* f), f)
FAILS(void*, mmap, MAP_FAILED, (void* p, size_t n, int protection, int flags, int fd, off_t from),
      p, n, protection, flags, fd, from)

// These are over even if they fail.
#define FAILS_LATE(name, failed, type) \
    int name(type what) { \
        NEXT(name); \
        const int error = arrive(ID_##name), result = next(what); \
        if (error > 0) return errno = error, failed; \
        return result; \
    }
FAILS_LATE(close, -1, int)
FAILS_LATE(fclose, EOF, FILE*)

#define TRANSFERS(name, n, parameters, ...) \
    ssize_t name parameters { \
        NEXT(name); \
        const int error = arrive(ID_##name); \
        if (error > 0) return errno = error, -1; \
        if (error == SHORT && n > 1) n /= 2; \
        return next(__VA_ARGS__); \
    }
TRANSFERS(read, n, (int fd, void* to, size_t n), fd, to, n)
TRANSFERS(write, n, (int fd, const void* from, size_t n), fd, from, n)
TRANSFERS(pread, n, (int fd, void* to, size_t n, off_t begin), fd, to, n, begin)
TRANSFERS(pwrite, n, (int fd, const void* from, size_t n, off_t begin), fd, from, n, begin)

#define OPENS(name, flags, parameters, ...) \
    int name parameters { \
        va_list args; \
        va_start(args, flags); \
        const int mode = flags & O_CREAT ? va_arg(args, int) : 0; \
        va_end(args); \
        NEXT(name); \
        const int error = arrive(ID_##name); \
        if (error > 0) return errno = error, -1; \
        return next(__VA_ARGS__, mode); \
    }
OPENS(open, flags, (const char* path, int flags, ...), path, flags)
OPENS(openat, flags, (int folder, const char* path, int flags, ...), folder, path, flags)

int pthread_create(pthread_t* restrict t, const pthread_attr_t* restrict a, void* (*f)(void*), void* restrict x) {
    NEXT(pthread_create);
    const int error = arrive(ID_pthread_create);
    return error > 0 ? error : next(t, a, f, x);
}

static int no_memory(size_t n) {
    const int large = n >= 4096 ? arrive(ID_large) : 0, any = arrive(ID_malloc);
    if (large > 0 || any > 0) errno = ENOMEM;
    return large > 0 || any > 0;
}
void* __libc_malloc(size_t n);
void* __libc_calloc(size_t n, size_t size);
void* __libc_realloc(void* p, size_t n);
void* __libc_memalign(size_t alignment, size_t n);
void* malloc(size_t n) { return no_memory(n) ? NULL : __libc_malloc(n); }
void* calloc(size_t n, size_t size) { return no_memory(n * size) ? NULL : __libc_calloc(n, size); }
void* realloc(void* p, size_t n) { return no_memory(n) ? NULL : __libc_realloc(p, n); }
void* aligned_alloc(size_t alignment, size_t n) { return no_memory(n) ? NULL : __libc_memalign(alignment, n); }
int posix_memalign(void** p, size_t alignment, size_t n) {
    return no_memory(n) || !(*p = __libc_memalign(alignment, n)) ? ENOMEM : 0;
}

static int (*real_main)(int, char**, char**);
static int armed_main(int argc, char** argv, char** environment) {
    const char* fault = getenv("FAULT");
    if (fault) sscanf(fault, "%31s %ld %15s %ld", function, &at, action, &number);
    armed = 1;
    return real_main(argc, argv, environment);
}
int __libc_start_main(int (*m)(int, char**, char**), int argc, char** argv, void (*init)(void), void (*fini)(void),
                      void (*ld_fini)(void), void* stack_end) {
    NEXT(__libc_start_main);
    real_main = m;
    return next(armed_main, argc, argv, init, fini, ld_fini, stack_end);
}

__attribute__((destructor)) static void write_counts(void) {
    armed = 0;
    const char* path = getenv("FAULT_COUNTS");
    FILE* f = path ? fopen(path, "w") : NULL;
    for (int i = 0; f && i < N; i++)
        if (calls[i] > 0) fprintf(f, "%s %ld\n", names[i], calls[i]);
    if (f) fclose(f);
}
